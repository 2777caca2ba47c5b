"""The unified model: a decoder backbone with a second table and a second head for image codes."""

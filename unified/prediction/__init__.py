"""Next-X prediction: which codes are predicted together, from what, and when."""

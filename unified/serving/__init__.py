"""One model for many callers: the engine and the web page."""

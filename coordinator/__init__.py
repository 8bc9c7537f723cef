"""The coordinator daemon: decides rounds and aggregates; never sees an image and never imports torch."""

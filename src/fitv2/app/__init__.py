"""The page in a browser; it calls the pipeline alone."""

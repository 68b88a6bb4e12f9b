"""Graph passes, one a file; the pipeline itself is the PIPELINE tuple below."""

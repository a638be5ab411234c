"""What `tools/reference_pages.py` writes, a page in each module."""

"""What is shown of results: tables, plots, pages, and results beside each other."""

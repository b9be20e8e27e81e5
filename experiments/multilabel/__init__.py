"""Several labels of a sample: Bibtex and Enron."""

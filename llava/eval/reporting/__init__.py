"""Results of one run as JSON and a line, and of several runs as a table with intervals and a page."""

"""Figures as HTML and SVG that need no network, no script and no plotting library; shared by pages and reports."""

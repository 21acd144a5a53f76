"""Pictures, tables and pages made from results: plain data in, never a model.

`page` writes one self-contained HTML file, `figures` draws with plotly, `terminal` prints with rich.
"""

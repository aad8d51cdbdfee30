"""The live dashboard of searches; `grafana/` has the board of a cluster.

Dash with Plotly, because: the pictures are Plotly figures already; only what changed travels to the browser, where
Streamlit would run the whole script again for every update and Panel holds a websocket and a copy of all the points
for every page; the page is plain HTML that a keyboard and a screen reader can use; and it serves its own scripts, so
it works without a network. Studies are read, never written; MLflow is not needed.
"""

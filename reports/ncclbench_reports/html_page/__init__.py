"""The parts of the HTML report: figures as plain data for plotly.js, tables as text, and the page around them."""

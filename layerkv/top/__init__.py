"""`layerkv top`: engines, their memory and their requests, live in a terminal or once as JSON."""

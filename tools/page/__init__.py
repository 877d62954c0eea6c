"""The page of tools/app.py: its work, its server, and the page itself in HTML, CSS and JavaScript."""

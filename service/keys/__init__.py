"""API keys: what a caller may do (`access`), the file that names the keys (`file`), and which key was sent (`ring`).

Knows no HTTP: `service.handlers.keys` reads headers and guards routes.
"""

"""The demo and its parts: load, one engine per subprocess, figures, report."""

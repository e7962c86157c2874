"""Page, card and project templates, and the one place that fills them in."""

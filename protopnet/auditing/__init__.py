"""What each prototype is (`audit`, `audit_pages`), and correcting a bundle without training it again (`prune`)."""

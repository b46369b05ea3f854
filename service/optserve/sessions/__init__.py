"""Who may step, and in what order: sessions, their journal and their replies."""

"""One file, one question, one record in notes.md."""

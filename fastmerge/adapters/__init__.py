"""Other tools, with fastmerge under them: one module each, which changes nothing before it is told to."""

"""The papers' tables: each file makes one, named after the file, and declares it as FIGURE."""

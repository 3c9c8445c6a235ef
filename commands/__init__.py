"""The top floor: one file for each thing a user asks for. `make` calls them; nothing imports them."""

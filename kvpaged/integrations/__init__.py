"""Other libraries' ways into the cache; each imported only when it is used."""

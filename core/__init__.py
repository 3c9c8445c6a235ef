"""The ground floor: what every stage needs. It imports nothing else of the project."""

"""The ground floor: what every stage needs. It imports nothing of the project but itself."""

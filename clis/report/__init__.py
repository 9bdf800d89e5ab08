"""The page of one or several runs: what is read from them, what is embedded, and the script that shows it."""

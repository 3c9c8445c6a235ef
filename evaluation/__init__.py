"""What training changed: held-out perplexity, answers and metrics before and after, and the report that shows them."""

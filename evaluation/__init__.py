"""What training changed: held-out perplexity and answers before and after, and the report that shows them."""

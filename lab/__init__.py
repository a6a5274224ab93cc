"""What is asked of a model: quality (evaluate), speed (benchmark) and the paper's claims (claims)."""

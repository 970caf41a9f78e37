"""Models that pool, from prompts to vectors and scores. Nothing is kept between steps."""

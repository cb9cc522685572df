"""All other methods beside a learner, on the same held-out tasks: fixed and tuned rates, searches."""

"""The lecturer's side of the coursework: build it from its masters, grade what comes back."""

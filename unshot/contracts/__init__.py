"""The files that cross from one stage to another, one typed record each."""

"""`unshot deploy drift`: whether live traffic still looks like what the model was made for."""

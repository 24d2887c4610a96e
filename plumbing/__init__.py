"""What every training script needs and no paper describes. Imports nothing but itself."""

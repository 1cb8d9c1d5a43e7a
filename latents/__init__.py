"""What happens to LATENTs and to decoded frames: thinning, motion, in-betweening."""

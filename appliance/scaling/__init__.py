"""The scale policy, the loop that runs it, and the signed signals it emits."""

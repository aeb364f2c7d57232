"""What leaves fourbit: merged and exported models, each with a record of where it comes from.

Nothing is imported here.
"""

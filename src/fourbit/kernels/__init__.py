"""Fast implementations of the operators; `fourbit.reference` defines what they compute."""

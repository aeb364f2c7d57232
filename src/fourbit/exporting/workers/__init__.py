"""Programs that run in environments of their own, where versions clash with fourbit's.

They are started as files, import nothing of fourbit, and are never imported by it. Beside each lies
the list of packages that its environment is made of.
"""

"""Data that a model writes itself: what its exits will see when they are used.

    template, prompts -> a wave of texts -> records -> one file, in the order of the texts' numbers

Text number i has a prompt and a seed that follow from i and the settings alone, and a *wave* is a
run of numbers that are written together. So a wave is the same whenever, and by whichever process,
it is written: there is nothing to save but how many waves are in the file.
"""

"""contextlora"""

"""Guest RAM: its mapping (`guest`), sets of pages (`pages`), which are in use (`pagemap`), and written (`dirty`)."""

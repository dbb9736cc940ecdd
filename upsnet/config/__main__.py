"""`python -m upsnet.config` prints the table of all recipe keys."""

from upsnet.config.reference import recipe_page

if __name__ == "__main__":
    print(recipe_page(), end="")

from plumbing.for_tests import same_random_numbers                                 # noqa: F401

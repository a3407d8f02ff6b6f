"""`--config FILE`: options of a training program from a file, as the words of a command line.

`yaml_file` reads YAML, `record` the `run.json` of a former run, `words` turns values into what the program's own parser
reads, so that types, ranges and former names of options are checked in one place.
"""

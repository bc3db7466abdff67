# Sourced first by the other scripts: --help prints the comment at the top of the script and exits.
case "${1:-}" in
  -h | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit
    ;;
esac

# Completion of tsctl for bash: words, and the pools of the daemon that answers.
_tsctl() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
    COMPREPLY=()
    case $before in
    --color)
        mapfile -t COMPREPLY < <(compgen -W 'auto always never' -- "$word")
        return
        ;;
    --pool | -P | pools | seqs | frag | map | top)
        mapfile -t COMPREPLY < <(compgen -W "$(tsctl pools 2>/dev/null | awk 'NR > 1 { print $1 }')" -- "$word")
        return
        ;;
    session)
        mapfile -t COMPREPLY < <(compgen -W kick -- "$word")
        return
        ;;
    pool)
        mapfile -t COMPREPLY < <(compgen -W 'create delete resize' -- "$word")
        return
        ;;
    delete | resize)
        mapfile -t COMPREPLY < <(compgen -W "$(tsctl pools 2>/dev/null | awk 'NR > 1 { print $1 }')" -- "$word")
        return
        ;;
    seq)
        mapfile -t COMPREPLY < <(compgen -W free -- "$word")
        return
        ;;
    drain)
        mapfile -t COMPREPLY < <(compgen -W off -- "$word")
        return
        ;;
    kick)
        mapfile -t COMPREPLY < <(compgen -W "$(tsctl sessions 2>/dev/null | awk 'NR > 1 { print $1 }')" -- "$word")
        return
        ;;
    esac
    if [[ $word == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W '--cells --color --help --json --pool --socket --usage --version --wait
            --watch --yes' -- "$word")
    else
        mapfile -t COMPREPLY < <(compgen -W 'status pools sessions seqs frag map check top session seq pool drain' -- "$word")
    fi
}
complete -F _tsctl tsctl

# Completion of tsctl for bash: words, and the pools of the daemon that answers.

# Offers those of the words that begin as the one at the cursor does.
_tsctl_offer() {
    mapfile -t COMPREPLY < <(compgen -W "$1" -- "${COMP_WORDS[COMP_CWORD]}")
}

# The names in what `tsctl pools` or `tsctl sessions` lists.
_tsctl_names() {
    tsctl "$1" 2>/dev/null | awk 'NR > 1 { print $1 }'
}

_tsctl() {
    COMPREPLY=()
    case ${COMP_WORDS[COMP_CWORD - 1]} in
    --color) _tsctl_offer 'auto always never' ;;
    --dtype) _tsctl_offer 'fp32 fp16 bf16 fp8_e4m3' ;;
    --model) mapfile -t COMPREPLY < <(compgen -f -- "${COMP_WORDS[COMP_CWORD]}") ;;
    --pool | -P | pools | seqs | frag | map | top | delete | resize | drop)
        _tsctl_offer "$(_tsctl_names pools)"
        ;;
    kick) _tsctl_offer "$(_tsctl_names sessions)" ;;
    session) _tsctl_offer kick ;;
    pool) _tsctl_offer 'create delete resize' ;;
    seq) _tsctl_offer free ;;
    cache) _tsctl_offer "drop $(_tsctl_names pools)" ;;
    drain) _tsctl_offer off ;;
    *)
        if [[ ${COMP_WORDS[COMP_CWORD]} == -* ]]; then
            _tsctl_offer '--block-tokens --cells --color --dtype --empty --gpus --help --json
                --memory --model --namespace --pool --shared --socket --tenant --tensor-parallel
                --tokens --usage --version --wait --watch --yes'
        else
            _tsctl_offer 'status pools sessions seqs frag map cache check top doctor plan session
                seq pool drain restart'
        fi
        ;;
    esac
}
complete -F _tsctl tsctl

# Before a package is made: what goes to /etc was installed below the prefix.
file(GLOB found ${CPACK_TEMPORARY_DIRECTORY}/*/usr/etc ${CPACK_TEMPORARY_DIRECTORY}/usr/etc)
foreach(folder ${found})
  string(REGEX REPLACE "/usr/etc$" "/etc" to ${folder})
  file(RENAME ${folder} ${to})
endforeach()

# `cpack` in a build folder makes Debian packages: tinyserved, libtinyserve0, libtinyserve-cuda0
# (where the CUDA compiler was found), libtinyserve-dev and tinyserve-tools. tests/check_debs.sh
# installs them.

# Below the prefix /usr it goes to /etc, as GNUInstallDirs has it; `cmake --install` alone knows the
# prefix. A file that is in /etc stays: it is the machine's own. No variable is called as a string
# is that is compared here: CMake would warn of it (CMP0054).
set(conf ${PROJECT_SOURCE_DIR}/systemd/tinyserved.conf)
install(
  CODE "
  set(conf_root \"${CMAKE_INSTALL_SYSCONFDIR}\")
  if(CMAKE_INSTALL_PREFIX MATCHES \"^/usr/?$\" AND conf_root STREQUAL \"etc\")
    set(conf_root /etc)
  elseif(NOT IS_ABSOLUTE \"\${conf_root}\")
    set(conf_root \"\${CMAKE_INSTALL_PREFIX}/\${conf_root}\")
  endif()
  if(conf_root STREQUAL \"/etc\" AND EXISTS \"\$ENV{DESTDIR}/etc/tinyserve/tinyserved.conf\")
    message(STATUS \"Kept: \$ENV{DESTDIR}/etc/tinyserve/tinyserved.conf\")
  else()
    file(INSTALL DESTINATION \"\${conf_root}/tinyserve\" TYPE FILE FILES \"${conf}\")
  endif()"
  COMPONENT daemon)

foreach(of daemon:tinyserved library:libtinyserve0 development:libtinyserve-dev
        tools:tinyserve-tools)
  string(REPLACE ":" ";" of ${of})
  list(GET of 0 component)
  list(GET of 1 package)
  install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/${package} RENAME copyright
          COMPONENT ${component})
endforeach()

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME tinyserve)
set(CPACK_PACKAGE_CONTACT "The TinyServe developers <tinyserve@localhost>")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "paged KV cache shared by the LLM workers of a node")
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
if(CMAKE_BUILD_TYPE MATCHES "Deb") # debug information goes to packages of its own, NAME-dbgsym
  set(CPACK_DEBIAN_DEBUGINFO_PACKAGE ON)
else()
  set(CPACK_STRIP_FILES ON)
endif()
set(CPACK_COMPONENTS_ALL daemon library development tools)
set(CPACK_COMPONENTS_GROUPING IGNORE)
set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SECTION net)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS_PRIVATE_DIRS ${PROJECT_BINARY_DIR}/client)
set(CPACK_DEBIAN_PACKAGE_GENERATE_SHLIBS ON)
set(CPACK_PRE_BUILD_SCRIPTS ${PROJECT_SOURCE_DIR}/tools/packages_etc.cmake)

set(CPACK_DEBIAN_DAEMON_PACKAGE_NAME tinyserved)
set(CPACK_DEBIAN_DAEMON_DESCRIPTION "the daemon: owns the blocks and runs attention
 Worker processes of large language models store keys and values of their
 sequences in its pools, in host or GPU memory, and share common prefixes.")
set(CPACK_DEBIAN_DAEMON_PACKAGE_DEPENDS systemd)
set(CPACK_DEBIAN_DAEMON_PACKAGE_RECOMMENDS tinyserve-tools)
foreach(script conffiles postinst prerm postrm)
  list(APPEND CPACK_DEBIAN_DAEMON_PACKAGE_CONTROL_EXTRA
       ${PROJECT_SOURCE_DIR}/systemd/debian/${script})
endforeach()
set(CPACK_DEBIAN_DAEMON_PACKAGE_CONTROL_STRICT_PERMISSION ON)

set(CPACK_DEBIAN_LIBRARY_PACKAGE_NAME libtinyserve0)
set(CPACK_DEBIAN_LIBRARY_PACKAGE_SECTION libs)
set(CPACK_DEBIAN_LIBRARY_DESCRIPTION "the workers' library
 Links workers to tinyserved: sequences, steps, and mapped blocks.")

set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_NAME libtinyserve-dev)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_DEPENDS "libtinyserve0 (= ${PROJECT_VERSION})")
set(CPACK_DEBIAN_DEVELOPMENT_DESCRIPTION "headers of the workers' library
 With what pkg-config and CMake need to find it.")

set(CPACK_DEBIAN_TOOLS_PACKAGE_NAME tinyserve-tools)
set(CPACK_DEBIAN_TOOLS_PACKAGE_DEPENDS "libtinyserve0 (= ${PROJECT_VERSION})")
set(CPACK_DEBIAN_TOOLS_DESCRIPTION "tsctl, tsbench and a demo
 tsctl shows operators what a daemon does; tsbench measures; ts-generate
 generates text with a tiny model.")

if(TS_CUDA_FOUND)
  list(APPEND CPACK_COMPONENTS_ALL cuda)
  set(CPACK_DEBIAN_CUDA_PACKAGE_NAME libtinyserve-cuda0)
  set(CPACK_DEBIAN_CUDA_PACKAGE_SECTION libs)
  set(CPACK_DEBIAN_CUDA_PACKAGE_DEPENDS "libtinyserve0 (= ${PROJECT_VERSION})")
  set(CPACK_DEBIAN_CUDA_DESCRIPTION "attention on a GPU by the workers themselves
 libtinyserve loads it for local execution on a GPU pool.")
endif()
include(CPack)
